// A stand-in for libnvidia-ml.so.1. At nvmlInit it reads the machine from the file that $FAKE_NVML names, see fake_nvml.py.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, MOST = 16 };

typedef struct { unsigned pid; unsigned long long bytes; unsigned gi, ci; } Process;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct {
    char uuid[96], name[96];
    long long total, used;  // a negative total: NVML doesn't tell
    int major, minor, mig_mode, parent, process_error, num_processes;
    Process processes[MOST];
} Device;

static Device devices[MOST];
static int num_devices;
static char names[MOST][96];
static unsigned pids[MOST];
static int num_names;

static Device *add(int parent) {
    Device *device = memset(&devices[num_devices++], 0, sizeof(Device));
    device->parent = parent;
    return device;
}

static Device *nth(int parent, unsigned n) {
    for (int i = 0; i < num_devices; i++)
        if (devices[i].parent == parent && n-- == 0) return &devices[i];
    return NULL;
}

int nvmlInitWithFlags(unsigned flags) {
    char line[512];
    int code = SUCCESS, gpu = -1;
    long long bytes;
    Device *device = NULL;
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    num_devices = num_names = 0;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "init %d", &code) == 1) continue;
        if (!strncmp(line, "gpu ", 4)) {
            gpu = num_devices;
            device = add(-1);
            sscanf(line, "gpu %95s %d.%d %lld %lld %d %95[^\n]", device->uuid, &device->major, &device->minor,
                   &device->total, &device->used, &device->mig_mode, device->name);
        } else if (!strncmp(line, "mig ", 4)) {
            device = add(gpu);
            sscanf(line, "mig %95s %lld %lld %95[^\n]", device->uuid, &device->total, &device->used, device->name);
        } else if (!strncmp(line, "process_error ", 14)) {
            sscanf(line, "process_error %d", &device->process_error);
        } else if (!strncmp(line, "process ", 8)) {
            names[num_names][0] = 0;
            sscanf(line, "process %u %lld %95[^\n]", &pids[num_names], &bytes, names[num_names]);
            device->processes[device->num_processes++] = (Process){pids[num_names++], (unsigned long long)bytes, 0, 0};
        }
    }
    fclose(file);
    return code;
}

int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    for (*count = 0; nth(-1, *count); ++*count) {}
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    return (*device = nth(-1, index)) ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetName(Device *device, char *name, unsigned length) {
    snprintf(name, length, "%s", device->name);
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned length) {
    snprintf(uuid, length, "%s", device->uuid);
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) {
    *major = device->major;
    *minor = device->minor;
    return device->parent < 0 ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    if (device->total < 0) return NOT_SUPPORTED;
    *memory = (Memory){device->total, device->total - device->used, device->used};
    return SUCCESS;
}

int nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
    *current = *pending = device->mig_mode > 0;
    return device->mig_mode < 0 ? NOT_SUPPORTED : SUCCESS;  // as GPUs before the A100 answer
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) {
    *count = 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned index, Device **instance) {
    return (*instance = nth((int)(device - devices), index)) ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *processes) {
    unsigned room = *count;
    *count = device->num_processes;
    if (device->process_error) return device->process_error;
    if (room < *count) return INSUFFICIENT_SIZE;
    if (*count) memcpy(processes, device->processes, *count * sizeof(Process));
    return SUCCESS;
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(Device *device, unsigned *count, Process *processes) {
    *count = 0;
    return device->process_error;
}

int nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length) {
    for (int i = 0; i < num_names; i++)
        if (pids[i] == pid && names[i][0]) return snprintf(name, length, "%s", names[i]) < 0;
    return NO_PERMISSION;
}
