"From a batch to sampled tokens: inputs, graphs, replay."
