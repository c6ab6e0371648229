// main() of the programs of cases.hpp.
#include "cases.hpp"

static bool named(const char* name, int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], name) == 0) return true;
  }
  return argc == 1;
}

int main(int argc, char** argv) {
  int ran = 0;
  for (const test::Case& c : test::cases()) {
    if (!named(c.name, argc, argv)) continue;
    std::printf("%s\n", c.name);
    c.run();
    ++ran;
  }
  if (ran < argc - 1) std::printf("unknown case\n");
  return test::failures > 0 || ran < argc - 1;
}
