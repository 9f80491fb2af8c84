"""Fair comparison: every method tuned under one protocol, then judged on fresh seeds. Imports cluster.

``study`` reads the study file, ``spaces`` what is tuned, ``coordinator`` runs trials on the cluster through
one ``search`` a method, ``protocol`` and ``report`` say what it all came to.
"""
