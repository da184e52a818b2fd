"The slow engine: the oracle of everything after it."
