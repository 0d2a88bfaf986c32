"""Load on running OpenAI-compatible servers: conversations, clients, figures. Knows no vLLM."""
