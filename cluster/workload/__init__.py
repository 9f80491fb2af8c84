"""What a federation trains and on what: data sets, their partition over clients, and models.

Imports numpy, torch and the standard library; decoders load only inside `prepare`, once per node.
"""
