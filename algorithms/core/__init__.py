"""The machinery that methods share: the contract, the flat vector, totals, masks, layers."""
