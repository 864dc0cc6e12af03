"""Search tools, a file each, behind two contracts, and the engines that find jackhmmer's candidates."""
