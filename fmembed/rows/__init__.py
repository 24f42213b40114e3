"""What travels down the line: rows, their ids and counts, the pieces the model takes, the
vectors it gives.
"""
