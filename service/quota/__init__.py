"""How much a workspace may ask for: `limits` names the limits and their values, `rates` and `caps` hold them."""
