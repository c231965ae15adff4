"""The data pipeline: data.txt → mixture → order → records → tokens and image slots → micro-batches.

It never imports `trainer`: a tokenizer and an image processor are passed in.
"""
