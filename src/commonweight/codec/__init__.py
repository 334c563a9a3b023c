"""What is sent, made small: lossy and lossless codings of rows of numbers, and the memory of what they lost.

stage.py      what a stage is                rounding.py   fewer bits a number
chain.py      stages one after the other     sparse.py     fewer numbers
feedback.py   what was lost is sent later    low_rank.py   fewer numbers, of matrices
down.py       the same, the other way        entropy.py    what is left, without redundancy

Nothing here knows of networks. Both ends make the same codec from the same recipe; a payload says nothing of how it is
to be read, and one that is not exactly what the codec writes is refused.
"""
