"""What a language model that judges is asked; files of text with {prompt}, {first} and {second}."""
