"""Optional features: delete this folder and a run without their flags still works.

Each module is imported only where its flag is set.
"""
