"""The prompts that every export answers: short questions of many kinds, the same for all models."""

PROMPTS = (
    "What is the capital of France?",
    "How much is 17 plus 25?",
    "Name three things that are yellow.",
    "Write a short poem about rain.",
    "What does a baker do?",
    "Explain in one sentence why the sky is blue.",
    "Translate 'good morning' into German.",
    "Write a Python function that reverses a list.",
    "What is the opposite of hot?",
    "Which is heavier, a kilogram of iron or a kilogram of feathers?",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "¿Cuántos días tiene una semana?",
    'Is this JSON valid? {"a": [1, 2, 3], "b": null}',
    "Hello",
    "Summarise: The ship left at dawn. The sea was calm, and by noon no land was in sight.",
)
