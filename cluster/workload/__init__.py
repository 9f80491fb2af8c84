"""What a federation trains and on what: data sets, their partition over clients, and models.

Imports numpy, torch and the standard library; decoders (pyarrow, PIL, datasets, sklearn) load only inside
`prepare`.
"""
