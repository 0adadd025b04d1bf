// What the shared library shows to the outside.
#pragma once

#if defined(_WIN32)
#if defined(EDGEDISTILL_BUILDING) && !defined(EDGEDISTILL_STATIC)
#define EDGEDISTILL_API __declspec(dllexport)
#elif !defined(EDGEDISTILL_STATIC)
#define EDGEDISTILL_API __declspec(dllimport)
#else
#define EDGEDISTILL_API
#endif
#else
#define EDGEDISTILL_API __attribute__((visibility("default")))
#endif
