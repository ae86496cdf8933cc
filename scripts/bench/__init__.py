"""What the benchmarks are made of; the commands that run them lie beside this folder."""
