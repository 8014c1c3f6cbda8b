"""Linear algebra of tensors: subspaces, decompositions, comparisons, eigenpairs; no model, no site."""
