"""Other libraries' GRUs and attention, each in a process of its own: contestants, not dependencies.

`peer.py` drives them, `op.py` says what they are asked for and `check.py` holds them to the
reference, all with torch. All else runs in .venv-peers (`make peers`) with numpy and one library,
so nothing is imported here.
"""
