"""`manylora bench peers`: manylora beside what is installed of llama.cpp, vLLM and peft, in one run."""
