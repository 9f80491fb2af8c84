"""An experiment of sparsyfed as an app of Flower: the same rounds, the same bytes, the same bits."""
