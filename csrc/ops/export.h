// Functions that the op libraries export beside their operators; the name begins with la2_ (hide_all.map).
#pragma once

#define LA2_EXPORT extern "C" __attribute__((visibility("default")))
