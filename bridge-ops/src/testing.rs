//! What tests of several operations share.
