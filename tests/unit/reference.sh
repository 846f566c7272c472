#!/bin/sh
# PyTorch's values on the plain loops of mpt.h's REFERENCE, which unit/operations and unit/model hold ENGINE against.
TEST_REFERENCE=1 "${BUILD:-build}/tests/parity/operations"
