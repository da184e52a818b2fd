"Who computes how many tokens, in which blocks. Pure Python: imports no tensor library."
