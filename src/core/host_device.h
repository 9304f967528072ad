// host_device.h - functions of host and device code, in headers that a plain C++ compiler reads.
#pragma once

#ifdef __CUDACC__
#define SLUICE_HOST_DEVICE __host__ __device__
#else
#define SLUICE_HOST_DEVICE
#endif
