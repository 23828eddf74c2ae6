"""Language models under the ecosystem's names, their files, and text from them."""
