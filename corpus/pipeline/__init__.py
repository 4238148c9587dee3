"""Preparation at scale: filters, deduplication and tokenising as tasks of Hugging Face's datatrove, on this machine,
Slurm or Ray. Needs the extra `data`."""
