"""The data pipeline: data.txt → mixture → order → records → tokens and image slots → micro-batches.

It never imports `trainer`: the conversation format and the image processor are passed in.
"""
