"""What a command is told: frozen dataclasses whose fields carry type, range and, as a comment, help.

A configuration is written flat (one name, one value) and held in sections, one for each part of the package that uses it. Nothing
in this folder imports torch, so that `--help` and every complaint about a configuration come at once.
"""
