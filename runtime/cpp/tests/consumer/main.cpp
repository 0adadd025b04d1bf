#include <edgedistill/edgedistill.hpp>

#include <iostream>

int main(int, char** arguments) try {
    edgedistill::Classifier classifier(arguments[1]);  // an openvino/ folder
    edgedistill::Prediction answer = classifier.classify_file(arguments[2]);
    std::cout << answer.label << ' ' << answer.probability << '\n';
} catch (const edgedistill::Error& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
