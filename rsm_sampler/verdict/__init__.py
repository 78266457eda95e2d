"""May the samples be trusted?"""
