"""Operations of the model, each with its plain-torch reference and its implementations: Triton for GPUs, C++ for CPUs,
libraries where they are installed.
"""
