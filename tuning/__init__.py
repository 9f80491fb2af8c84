"""Fair comparison: studies, protocol, report. Imports cluster and algorithms."""
