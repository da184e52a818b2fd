"From files to a forward pass: tokenizer, weights, the LLaMA family."
