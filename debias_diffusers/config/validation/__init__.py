"""What a configuration must satisfy: the ranges that stand on its fields, and rules between fields.

All problems are found before anything is reported, in sentences that name the field, its value, and a value that works.
"""
