"""What the network sees: the OpenAI HTTP app and the life of the serving process."""
