"The OpenAI-compatible server."
