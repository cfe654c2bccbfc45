/* Preloaded into a process, lets torch's CUDA build count devices without a driver. Its name for the linker is that of
   NVIDIA's driver library, so that torch, which loads that by name, finds this one. Nothing is ever computed on it. */
#include <stdbool.h>

#define NO_DEVICE 100 /* CUDA_ERROR_NO_DEVICE */
#define REFUSES(function) \
  int function(void) { return NO_DEVICE; }

/* c10::cuda::device_count and c10::cuda::hasPrimaryContext. The count starts at 0, while torch installs its guard. */
signed char pretended_devices = 0;
signed char _ZN3c104cuda12device_countEv(void) { return pretended_devices; }
bool _ZN3c104cuda17hasPrimaryContextEa(signed char device) {
  (void)device;
  return false;
}

/* What torch's autograd asks of the driver: no device is in use. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  (void)device;
  if (flags) *flags = 0;
  if (active) *active = 0;
  return 0;
}

/* What torch looks up beside it, and must find. */
REFUSES(cuCtxGetCurrent)
REFUSES(cuCtxSetCurrent)
REFUSES(cuDeviceGet)
REFUSES(cuDeviceGetAttribute)
REFUSES(cuDevicePrimaryCtxRetain)
REFUSES(cuFuncGetAttribute)
REFUSES(cuFuncSetAttribute)
REFUSES(cuFuncSetCacheConfig)
REFUSES(cuGetErrorString)
REFUSES(cuLaunchCooperativeKernel)
REFUSES(cuLaunchKernel)
REFUSES(cuLinkAddData_v2)
REFUSES(cuLinkComplete)
REFUSES(cuLinkCreate_v2)
REFUSES(cuModuleGetFunction)
REFUSES(cuModuleLoad)
REFUSES(cuModuleLoadData)
REFUSES(cuModuleLoadDataEx)
REFUSES(cuModuleUnload)
REFUSES(cuOccupancyMaxActiveBlocksPerMultiprocessor)
REFUSES(cuPointerGetAttribute)
REFUSES(cuTensorMapEncodeTiled)
