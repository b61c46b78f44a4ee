// The version string that each extension module contains. Before fused_dropout/native.py loads a module, it searches
// the file for this string.
#pragma once

// Two macros, so that x is expanded before it becomes a string.
#define FUSED_DROPOUT_STRING(x) #x
#define FUSED_DROPOUT_EXPANDED(x) FUSED_DROPOUT_STRING(x)
#define FUSED_DROPOUT_BUILT(name) "fused_dropout." name " " FUSED_DROPOUT_EXPANDED(FUSED_DROPOUT_VERSION) ";"
