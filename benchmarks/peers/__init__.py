"""Other libraries' GRUs, each in a process of its own: contestants, not dependencies.

`peer.py` drives them and `check.py` holds them to the reference, both with torch. All else runs in
.venv-peers (`make peers`) with numpy and one library, so nothing is imported here.
"""
