"""Linear algebra of tensors only: subspaces, decompositions, comparisons, eigenpairs."""
