"""What training can do without: delete this folder and a run without these flags still works.

Each module is imported only where its flag asks for it.
"""
