"""One level of the way down a drafted tree: which child of each row's node is accepted, and the token behind the node."""
