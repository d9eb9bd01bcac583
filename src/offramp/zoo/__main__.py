"""Print the pip requirements of the zoo's weights, one a line."""

from offramp.zoo import requirements

print("\n".join(requirements()))
