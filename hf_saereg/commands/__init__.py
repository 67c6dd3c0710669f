"""One module a command of `saereg`: its options, and `main(words)`."""
