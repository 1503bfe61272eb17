"""How batches are computed: packing, attention, dropout, precision, CUDA graphs, FLOPs."""
