// Page copies: see include/pages.cuh.
#include "pages.cuh"

QUIRE_KERNEL_BOUNDS(quire_copy_pages, QuireCopyPagesParams, 256, 4) { quire::copy_pages(p); }
