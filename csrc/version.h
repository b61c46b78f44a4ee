// What a library says of itself: fused_dropout/native.py looks for these bytes in the file before it loads it.
#pragma once

#define FUSED_DROPOUT_STRING(x) #x
#define FUSED_DROPOUT_EXPANDED(x) FUSED_DROPOUT_STRING(x)
#define FUSED_DROPOUT_BUILT(name) "fused_dropout." name " " FUSED_DROPOUT_EXPANDED(FUSED_DROPOUT_VERSION) ";"
