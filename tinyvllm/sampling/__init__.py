"How a token is chosen: parameters, the sampler on the host, constraints."
