// Embedding and row gather: see include/rows.cuh.
#include "rows.cuh"

QUIRE_KERNEL_BOUNDS(quire_embed_bf16, QuireEmbedParams, 256, 8) { quire::embed<quire::bf16>(p); }
QUIRE_KERNEL_BOUNDS(quire_embed_f16, QuireEmbedParams, 256, 8) { quire::embed<quire::f16>(p); }
QUIRE_KERNEL_BOUNDS(quire_gather_rows_bf16, QuireGatherRowsParams, 256, 8) { quire::gather_rows<quire::bf16>(p); }
QUIRE_KERNEL_BOUNDS(quire_gather_rows_f16, QuireGatherRowsParams, 256, 8) { quire::gather_rows<quire::f16>(p); }
