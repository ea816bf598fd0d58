"""Small language models that the project trains itself, and the code that trains them."""
